"""14_more_than_one_card: see qlora_lab/classroom/lessons/__init__.py."""
