"""dive_a_better_codebooks: see qlora_lab/classroom/lessons/__init__.py."""
