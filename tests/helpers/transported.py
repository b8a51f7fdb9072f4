"""Training samples of counted tokens, whose images need not exist: for packing and transports."""

from pointillist.refs import MMImageRef, MMRefs, make_descriptor
from pointillist.transport import TrainingSample

SHA = "ab" * 32
URI = f"file:///data/outputs/run_20261124/assets/images/ab/{SHA}.png"
ITEM = make_descriptor("qwen_vl", URI, "0" * 32, {"image_grid_thw": [1, 4, 4]})


def sample(name: str = "s", text: int = 6, images: int = 1) -> TrainingSample:
    """Images of two tokens each, then text, of which the second half is sampled."""
    types = [1, 1, 0] * images + [0] * text
    length = len(types)
    trained = [index >= length - text // 2 for index in range(length)]
    return TrainingSample(
        token_ids=list(range(length)),
        loss_mask=trained,
        logprobs_sampled=[-0.5 if on else 0.0 for on in trained],
        advantages=[1.0 if on else 0.0 for on in trained],
        weight_versions=[3 if on else -1 for on in trained],
        temperatures=[0.7 if on else 1.0 for on in trained],
        mm_token_type_ids=types,
        mm_refs=MMRefs([MMImageRef(ITEM, SHA, URI, 3 * i, 2) for i in range(images)]) if images else None,
        sample_id=name,
    )
