"""The table that `make sweep` prints."""

COLUMNS = "training", "packing", "chunks", "lora", "qlora", "two processes"


def pytest_terminal_summary(terminalreporter, config):
    if "sweep" not in config.option.markexpr:
        return
    cells = {}
    for outcome in ("passed", "failed"):
        for report in terminalreporter.stats.get(outcome, ()):
            cells.update({tuple(cell[:2]): cell[2] for key, cell in report.user_properties if key == "sweep"})
    names = sorted({name for name, _ in cells})
    if names:
        terminalreporter.section(f"{len(names)} architectures")
        terminalreporter.write_line(f"{'':<24}" + "".join(f"{column:<22}" for column in COLUMNS))
        for name in names:
            row = "".join(f"{cells.get((name, column), '-'):<22}" for column in COLUMNS)
            terminalreporter.write_line(f"{name:<24}{row}")
