"""The solvers. ``SOLVERS`` is the one list that the command line, the documentation and all tests loop over."""

from __future__ import annotations

from fastode.solvers.adams import deis, ipndm, ipndm_v, lms
from fastode.solvers.amed import amed, plugin
from fastode.solvers.ancestral import ddpm, dpm_2_ancestral, dpmpp_2s_ancestral, euler_ancestral
from fastode.solvers.ddim import ddim
from fastode.solvers.dpm_solver import dpm_solver_2, dpm_solver_3, dpm_solver_pp_s
from fastode.solvers.dpm_solver_pp import dpm_solver_pp
from fastode.solvers.heun import edm, heun
from fastode.solvers.langevin import pc
from fastode.solvers.lcm import lcm
from fastode.solvers.pndm import pndm
from fastode.solvers.restart import with_restarts
from fastode.solvers.sa_solver import sa_solver
from fastode.solvers.sampler_scheduler import segments
from fastode.solvers.sde_dpm_solver_pp import dpmpp_3m_sde, dpmpp_sde, sde_dpm_solver_pp
from fastode.solvers.solver import Solver, SolverTable
from fastode.solvers.unipc import unipc

SOLVERS: SolverTable = SolverTable(
    {
        "ddim": Solver("ddim", ddim),
        "heun": Solver("heun", heun),
        "dpm_solver_2": Solver("dpm_solver_2", dpm_solver_2),
        "dpm_solver_3": Solver("dpm_solver_3", dpm_solver_3),
        "dpm_solver_pp": Solver("dpm_solver_pp", dpm_solver_pp, grid="log_snr"),
        "dpm_solver_pp_s": Solver("dpm_solver_pp_s", dpm_solver_pp_s, grid="log_snr"),
        "deis": Solver("deis", deis, grid="quadratic"),
        "ipndm": Solver("ipndm", ipndm),
        "ipndm_v": Solver("ipndm_v", ipndm_v),
        "unipc": Solver("unipc", unipc, grid="log_snr"),
        "pndm": Solver("pndm", pndm),
        "lms": Solver("lms", lms),
        "edm": Solver("edm", edm, final="zero"),
        "amed": Solver("amed", amed, grid="time_uniform"),
        "euler_ancestral": Solver("euler_ancestral", euler_ancestral, final="zero"),
        "dpm_2_ancestral": Solver("dpm_2_ancestral", dpm_2_ancestral, final="zero"),
        "dpmpp_2s_ancestral": Solver("dpmpp_2s_ancestral", dpmpp_2s_ancestral, final="zero"),
        "ddpm": Solver("ddpm", ddpm, final="zero", grid="time_uniform"),
        "sde_dpm_solver_pp": Solver("sde_dpm_solver_pp", sde_dpm_solver_pp, final="zero"),
        "dpmpp_3m_sde": Solver("dpmpp_3m_sde", dpmpp_3m_sde, final="zero"),
        "dpmpp_sde": Solver("dpmpp_sde", dpmpp_sde, final="zero"),
        "sa_solver": Solver("sa_solver", sa_solver),
        "lcm": Solver("lcm", lcm, final="zero"),
        "restart": Solver("restart", with_restarts, final="zero"),
        "sampler_scheduler": Solver("sampler_scheduler", segments, final="zero"),
    },
    aliases={
        "euler": "ddim",
        "dpm++": "dpm_solver_pp",
        "dpmpp": "dpm_solver_pp",
        "dpmpp_2m": "dpm_solver_pp",
        "dpmpp_2s": "dpm_solver_pp_s",
        "dpm_2": "dpm_solver_2",
        "dpm_solver++": "dpm_solver_pp",
        "plms": "pndm",
        "euler_a": "euler_ancestral",
        "k_dpm_2_ancestral": "dpm_2_ancestral",
        "dpmpp_2m_sde": "sde_dpm_solver_pp",
        "sde-dpmsolver++": "sde_dpm_solver_pp",
        "dpm_solver_sde": "dpmpp_sde",
        "consistency": "lcm",
    },
)

__all__ = ["SOLVERS", "Solver", "pc", "plugin"]
