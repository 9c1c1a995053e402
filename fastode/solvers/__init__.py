"""The solvers. ``SOLVERS`` is the one list that the command line, the documentation and all tests loop over."""

from __future__ import annotations

from fastode.solvers.adams import deis, ipndm, ipndm_v, lms
from fastode.solvers.amed import amed, plugin
from fastode.solvers.ddim import ddim
from fastode.solvers.dpm_solver import dpm_solver_2, dpm_solver_3, dpm_solver_pp_s
from fastode.solvers.dpm_solver_pp import dpm_solver_pp
from fastode.solvers.heun import edm, heun
from fastode.solvers.pndm import pndm
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
    },
)

__all__ = ["SOLVERS", "Solver", "plugin"]
