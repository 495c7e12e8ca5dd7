"""The comparison of `gatedffn compare`: one model, one text, several feed-forwards.

Read `settings.py` (what is compared), `study.py` (which runs there are), `training.py` (one run),
`statistics.py` (what may be concluded) and `report.py` (what is shown).
"""
