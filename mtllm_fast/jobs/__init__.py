"""Work that is done in pieces and goes on after a kill.

durable      files and folders that are whole or not there, locks, marks of completeness
fingerprint  content known by digest
ledger       pieces that are done, each under the key that it was made with
checkpoint   the states of a training run
parts        windows of an output file, made by any number of processes
measured     a command in a process of its own, with what it used
"""
