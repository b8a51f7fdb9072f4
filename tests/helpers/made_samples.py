"""Training samples of made-up tokens over real images, for tests of the trainer."""

import numpy as np

from pointillist.families import Family, place_image
from pointillist.images import ImageStore
from pointillist.refs import MMRefs, mm_token_type_ids
from pointillist.transport import TrainingSample
from tests.helpers.pictures import encoded, picture


def trained_sample(family: Family, store: ImageStore, sizes: list[tuple[int, int]], seed: int) -> TrainingSample:
    """Text, images of these sizes, text; the last five tokens are trained."""
    random = np.random.default_rng(seed)
    ids: list[int] = random.integers(8, 280, 5).tolist()
    refs = []
    for index, (width, height) in enumerate(sizes):
        stored = store.put(encoded(picture(width, height, seed + index)))
        layout = family.layout(width, height)
        refs.append(place_image(family, stored, layout, len(ids) + 1))
        ids += [3, *[family.image_token_id] * layout.num_tokens, 4]
    ids += random.integers(8, 280, 9).tolist()
    trained = [index >= len(ids) - 5 for index in range(len(ids))]
    return TrainingSample(
        token_ids=ids,
        loss_mask=trained,
        logprobs_sampled=[-6.0 if on else 0.0 for on in trained],  # about what the model of these tests gives
        advantages=[1.0 if on else 0.0 for on in trained],
        weight_versions=[0 if on else -1 for on in trained],
        temperatures=[0.7 if on else 1.0 for on in trained],
        mm_token_type_ids=mm_token_type_ids(ids, family.image_token_id),
        mm_refs=MMRefs(refs) if refs else None,
        sample_id=str(seed),
    )
