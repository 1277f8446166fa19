"""What 08_your_data does to a sample to show a mistake that people make."""

import dataclasses

from qlora_lab.training.chat import TokenizedSample


def without_end(sample: TokenizedSample) -> TokenizedSample:
    """The same sample; its last token, which ends the answer, is read, but not learned."""
    last = len(sample.ids) - 1
    return dataclasses.replace(sample, between=(*sample.between, (last, last + 1)))
