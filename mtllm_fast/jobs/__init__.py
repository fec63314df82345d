"""Work that is done in pieces and goes on after a kill.

durable      files and folders that are whole or not there, locks, marks of completeness
fingerprint  content known by digest
ledger       pieces that are done, each under the key that it was made with
checkpoint   the states of a training run
"""
