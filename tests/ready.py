"""What every rank would do anew at first use, in 1.5 s of CPU; tests/ranks.py imports this before it forks."""

import numba

from trainer import report_page

numba.njit(lambda x: x + 1).compile("int64(int64)")  # Numba makes its tables of types and functions
report_page.template()
