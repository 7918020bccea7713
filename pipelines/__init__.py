"""KFP pipelines; `compile.py` writes them to `compiled/`."""
