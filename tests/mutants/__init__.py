"""Planted faults: which single-line faults the tests find.

    python -m tests.mutants                     all that have no result yet
    python -m tests.mutants --only kernels --limit 20

planted.py   what a mutant is, and the lists of them together
kernels.py, triton.py, losses.py, data.py, attention.py, trainer.py   the lists: exact old text, new text, tests
server.py    a process that has imported torch once, and forks for every mutant
__main__.py  which mutants are run, and the table of their results
"""
