"""From a request's `features` to checked images; every fault is named by the image it belongs to."""

from pointillist.errors import MissingImageError, PointillistError, RefError, RequestError
from pointillist.inference.protocol import PlaceholderRange, PromptFields
from pointillist.refs.mm_refs import IMAGE, MMImageRef, check_spans, mm_token_type_ids
from pointillist.refs.wire import decode_ref

_FIELD = "features.kwargs_data.image"


def images_of(request: PromptFields, image_token_id: int, max_images: int) -> list[MMImageRef]:
    """Images of a request, at their places in its tokens.

    Raises:
        RequestError: 400, by the contract's section 4.
    """
    token_types = mm_token_type_ids(request.token_ids, image_token_id)
    features = request.features
    if features is None:
        if IMAGE in token_types:
            raise invalid("token_ids hold image placeholders, but the request has no features", _FIELD)
        return []
    hashes, placeholders = features.mm_hashes.image, features.mm_placeholders.image
    data = features.kwargs_data.image if features.kwargs_data is not None else []
    if not len(hashes) == len(placeholders) == len(data):
        raise invalid(
            f"{len(hashes)} mm_hashes, {len(placeholders)} mm_placeholders and {len(data)} kwargs_data entries: "
            "expected one of each for every image, in every request",
            _FIELD,
        )
    if len(data) > max_images:
        raise invalid(f"{len(data)} images, at most {max_images} are accepted", _FIELD)
    images = [_image(*each, index) for index, each in enumerate(zip(data, hashes, placeholders, strict=True))]
    try:
        check_spans(images, token_types)
    except RefError as error:
        raise request_error(error) from None
    return images


def request_error(error: PointillistError) -> RequestError:
    """The structured 400 for what materialising a request's references raised; `param` names the image."""
    param = _FIELD if error.image_index is None else f"{_FIELD}[{error.image_index}]"
    if isinstance(error, MissingImageError):
        return RequestError(str(error), type="missing_mm_image", param=param)
    return invalid(str(error), param)


def invalid(message: str, param: str) -> RequestError:
    """A structured 400 for a reference."""
    return RequestError(message, type="invalid_mm_image_ref", param=param)


def _image(entry: object, sha256: object, place: PlaceholderRange, index: int) -> MMImageRef:
    try:
        image = decode_ref(entry, place.offset, place.length)
    except RefError as error:
        raise invalid(str(error), f"{_FIELD}[{index}]") from None
    if sha256 != image.hash:
        raise invalid("mm_hashes and the reference name different hashes", f"{_FIELD}[{index}]")
    return image
