import os

# Tests run in one process per core, and many start processes of their own: more threads would only wait for each other.
# Before torch is imported, so that it holds for those, too.
os.environ.setdefault("OMP_NUM_THREADS", "1")
