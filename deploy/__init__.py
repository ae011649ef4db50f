"""How the service is put on machines: one machine (`local.py`) and containers (`docker/`)."""
