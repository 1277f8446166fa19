"""dive_b_why_low_rank: see qlora_lab/classroom/lessons/__init__.py."""
