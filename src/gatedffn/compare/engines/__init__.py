"""Where the runs of a comparison are done: in this process, in several, or on a Ray cluster.

Each module has one pool. A pool takes runs and says how they ended; which runs there are, who may
do them, and what is kept is `study.py`'s.
"""
