"""06_lora: see qlora_lab/classroom/lessons/__init__.py."""
