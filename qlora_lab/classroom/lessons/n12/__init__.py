"""12_ship_it: see qlora_lab/classroom/lessons/__init__.py."""
