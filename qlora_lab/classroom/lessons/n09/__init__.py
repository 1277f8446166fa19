"""09_your_gpu: see qlora_lab/classroom/lessons/__init__.py."""
