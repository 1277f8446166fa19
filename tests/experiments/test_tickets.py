"""The tickets of lesson 08 and of `experiments splits` have the mess that they are for."""

from qlora_lab.experiments.tickets import AGAIN, DAYS, READ_AS, tickets, write_tickets
from qlora_lab.training.data import stream_rows
from qlora_lab.training.formats import Understood


def test_the_file_is_read_as_it_was_made(tmp_path):
    rows, understood = tickets(), Understood()
    read = list(stream_rows(write_tickets(tmp_path / "tickets.csv"), columns=READ_AS, understood=understood))
    assert [row for _, row, _ in read] == [row for row in rows if row["message"] and row["reply"]]
    left_out = {reason: count for reason, (count, _) in understood.left_out.items()}
    assert left_out == {"with an empty response": 4, "with an empty prompt": 1}


def test_half_of_the_replies_hold_a_day_that_the_message_does_not():
    for seed in range(5):
        rows = tickets(seed, messy=False)
        with_day = [row for row in rows if any(day in row["reply"] for day in DAYS)]
        assert 0.4 < len(with_day) / len(rows) < 0.6
        assert not [row for row in rows if any(day in row["message"] for day in DAYS)]
        again = [row for row in rows if row["message"].startswith(AGAIN)]
        first = {row["customer"]: row["reply"] for row in rows if row not in again}
        assert len(first) == 64 and 10 < len(again) < 40
        assert all(first[row["customer"]] == row["reply"] for row in again)
