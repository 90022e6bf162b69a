"""States of fixed size that layers carry from token to token, and the rules by which tokens change them.

`states` says what a state is, `modules` and `rules` how a rule is made, `registry` which there are. The probe reads
them, and so does the trace.
"""
