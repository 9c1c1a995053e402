"""k-diffusion's `sample_dpmpp_3m_sde`: first step of order 1, second 2M of heun type, then 3M; see sde_dpm_solver_pp.py."""

from functools import partial

from tests.papers import sde_dpm_solver_pp

sample = partial(sde_dpm_solver_pp.sample, order=3, solver_type="heun", lower_order_final=False)
