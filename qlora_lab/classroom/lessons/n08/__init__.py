"""08_your_data: see qlora_lab/classroom/lessons/__init__.py."""
