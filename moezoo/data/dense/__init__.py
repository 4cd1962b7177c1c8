"""The two dense multi-task benchmarks, NYUD-v2 and PASCAL-Context, from the archives on disk."""
