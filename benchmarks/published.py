"""FIDs that the papers print, to set our orderings beside theirs. Lower is better; by number of evaluations.

Sources: AMED-Solver (arXiv:2312.00094v2, table 2) and the README of diff-sampler by the same authors, with EDM's networks. Each
solver on its own levels: ``euler``, ``heun``, ``dpm_solver_2`` and ``ipndm`` on rho = 7, DPM-Solver++ and UniPC uniform in
log-SNR, DEIS uniform in the square root of time. Odd numbers of Heun and DPM-Solver-2 use the analytical first step.
"""

from __future__ import annotations

NFES = tuple(range(3, 11))

Table = dict[str, tuple[float, ...]]

CIFAR10: Table = {
    "ddim": (93.36, 66.76, 49.66, 35.62, 27.93, 22.32, 18.43, 15.69),
    "heun": (306.2, 319.87, 97.67, 99.74, 37.28, 38.06, 15.76, 15.93),
    "dpm_solver_2": (155.7, 145.98, 57.30, 60.00, 10.20, 10.30, 4.98, 5.01),
    "dpm_solver_pp": (110.03, 46.52, 24.97, 11.99, 6.74, 4.54, 3.42, 3.00),
    "unipc": (109.61, 45.20, 23.98, 11.14, 5.83, 3.99, 3.21, 2.89),
    "deis": (56.01, 25.66, 14.39, 9.40, 6.94, 5.55, 4.68, 4.09),
    "ipndm": (47.98, 24.82, 13.59, 7.05, 5.08, 3.69, 3.17, 2.77),
}

FFHQ: Table = {
    "ddim": (78.21, 57.48, 43.93, 35.22, 28.86, 24.39, 21.01, 18.37),
    "heun": (356.5, 344.87, 116.7, 142.39, 54.51, 57.21, 28.86, 29.54),
    "dpm_solver_2": (266.0, 238.57, 87.10, 83.17, 22.59, 22.84, 9.26, 9.46),
    "dpm_solver_pp": (86.45, 45.95, 22.51, 13.74, 8.44, 6.04, 4.77, 4.12),
    "unipc": (86.43, 44.78, 21.40, 12.85, 7.44, 5.50, 4.47, 3.84),
    "deis": (54.52, 28.31, 17.36, 12.25, 9.37, 7.59, 6.39, 5.56),
    "ipndm": (45.98, 28.29, 17.17, 10.03, 7.79, 5.52, 4.58, 3.98),
}

IMAGENET64: Table = {
    "ddim": (82.96, 58.43, 43.81, 34.03, 27.46, 22.59, 19.27, 16.72),
    "heun": (249.4, 249.41, 89.63, 89.63, 37.65, 37.65, 16.76, 16.46),
    "dpm_solver_2": (140.2, 129.75, 42.41, 44.83, 12.03, 12.42, 6.64, 6.84),
    "dpm_solver_pp": (91.52, 56.34, 25.49, 15.06, 10.14, 7.84, 6.48, 5.67),
    "unipc": (91.38, 55.63, 24.36, 14.30, 9.57, 7.52, 6.34, 5.53),
    "deis": (44.51, 23.53, 14.75, 12.57, 8.20, 6.84, 5.97, 5.34),
    "ipndm": (58.53, 33.79, 18.99, 12.92, 9.17, 7.20, 5.91, 5.11),
}

TABLES: dict[str, Table] = {"CIFAR-10": CIFAR10, "FFHQ 64": FFHQ, "ImageNet 64": IMAGENET64}

AS_PUBLISHED = {
    "ddim": "ddim@karras",
    "heun": "heun@karras",
    "dpm_solver_2": "dpm_solver_2@karras",
    "dpm_solver_pp": "dpm_solver_pp:order=3@log_snr",
    "unipc": "unipc:order=3@log_snr",
    "deis": "deis:order=4@quadratic",
    "ipndm": "ipndm:order=4@karras",
}
"""The same settings as entries of `fastode compare --solvers`."""
