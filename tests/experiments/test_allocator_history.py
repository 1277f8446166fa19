from qlora_lab.experiments.allocator_history import live_at_peak


def test_history_is_replayed_up_to_its_peak():
    def entry(action: str, address: int, size: int, *frames: tuple[str, int, str]) -> dict:
        keys = ("filename", "line", "name")
        return {
            "action": action,
            "addr": address,
            "size": size,
            "frames": [dict(zip(keys, f, strict=True)) for f in frames],
        }

    linear = ("/x/torch/nn/modules/linear.py", 100, "forward")
    layer = ("/x/peft/tuners/lora/bnb.py", 221, "forward")
    trace = [
        entry("segment_alloc", 0, 1 << 20),
        entry("alloc", 0, 512, linear, layer),
        entry("alloc", 512, 512, linear, layer),
        entry("alloc", 1024, 2048),
        entry("free_requested", 512, 512),
        entry("free_completed", 512, 512),
        entry("alloc", 512, 256, layer),
        entry("free_requested", 1024, 2048),
    ]
    peak, blocks = live_at_peak(trace)
    assert peak == 512 + 512 + 2048
    assert blocks == {("lora/bnb.py:221 forward", 512): 2, ("C++", 2048): 1}
