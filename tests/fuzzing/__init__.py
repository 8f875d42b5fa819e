"""Bad input made by machine: mutators, what must hold of every input, and a runner. No tests: tests/test_fuzz.py and
benchmarks/fuzz.py share it.

    schema.py      what a document must be, written down a second time: what breaks it must be refused
    mutate.py      one well-formed input -> many wrong ones
    oracle.py      is a plan legal? from the JSON documents alone
    attempt.py     one call of a command or of the library, and whether it ended as it may
    kinds_*.py     a class for each kind of input: makes one, tries it
    worker.py      the process that tries them, under a limit of memory and of time for each
    runner.py      starts workers, counts, keeps what failed

An input is a function of kind, seed and index alone, so that a failure can be made again.
"""
