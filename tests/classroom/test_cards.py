"""What a plain run needs of a card."""

from qlora_lab.classroom import cards


def test_a_run_is_reckoned_as_it_is_planned(capsys):
    case = {"model": "llama-2-7b", "card": cards.CARDS["L4"], "length": 768, "epochs": 2}
    cards.reckon(case, batch=4, samples=3000)
    need = cards.needed_by_script("llama-2-7b", 4, 768).card_bytes / 1e9
    took = cards.hours("llama-2-7b", case["card"], 4, 768, 3000, 2)
    said = f"{need:.1f} of 23.5 GB; {took:.1f} hours as planned, {2 * took:.1f} at half the speed\n"
    assert capsys.readouterr().out == said and 1 < took < 4


def test_what_the_script_needs_holds_as_many_scores_as_trl(monkeypatch):
    """TRL's tile is 4,096 tokens x 32,768 words: of 128,256 words 1,046.5 rows, of 32,000 all rows up to 4,096."""
    monkeypatch.setattr("qlora_lab.memory.estimate", lambda shape, **given: given)
    settings = {"rank": 16, "optimizer": "adamw_torch", "sequence_length": 1024}
    for model, batch, rows in (("llama-3-8b", 16, 1047), ("llama-3-8b", 1, 262), ("llama-7b", 2, 2048)):
        given = cards.needed_by_script(model, batch, 1024)
        assert given == settings | {"batch_size": batch, "loss_chunk": rows}
    assert cards.needed_by_script("llama-7b", 2, 1024, rank=4)["rank"] == 4


def test_a_larger_batch_than_the_largest_does_not_fit():
    for name, batch in cards.largest_batches("llama-2-13b", 1024).items():
        needs = [cards.needed_by_script("llama-2-13b", many, 1024).card_bytes for many in (batch, 2 * batch)]
        assert needs[0] <= cards.CARDS[name]["GB"] * 1e9 < needs[1]
    assert set(cards.largest_batches("llama-65b", 1024).values()) == {0}
