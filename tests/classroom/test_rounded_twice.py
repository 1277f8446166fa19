"""What lesson 12 and dive H show of the record is what the page on exports has."""

from qlora_lab.classroom.rounded_twice import base_alone
from qlora_lab.classroom.source import REPOSITORY


def test_the_base_alone_is_that_of_the_page_on_exports():
    page = (REPOSITORY / "docs" / "export.md").read_text(encoding="utf-8")
    assert f"| NF4 | {base_alone('NF4').loss:.3f} | | | | |" in page and not base_alone("NF4").size
    for way in ("Q4_0", "Q4_0 from NF4", "Q4_0 from NF4, errors shuffled"):
        base = base_alone(way)
        assert f"| {way} | {base.loss:.3f} | {base.size:.3f} | {round(base.shift, 3) + 0.0:+.3f} |" in page
