from qlora_lab.experiments.__main__ import main


def test_every_recorded_run_is_compared(capsys):
    assert main(["memory", "--compare"]) == 0
    printed = capsys.readouterr().out
    for word in ("development: ", "held out: 16 runs", "preset: ", "unexplained", "tensors alive"):
        assert word in printed
