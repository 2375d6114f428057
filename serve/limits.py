"""What a server accepts: limits on bodies, images, tensors, waiting and time, and the checks that apply them.

Every check raises `RequestError`, which becomes one HTTP status and one sentence; none quotes an image's content.
"""

import math
import re
from collections.abc import AsyncIterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO

import PIL.Image
import PIL.ImageOps
from pydantic import Field

from dataeff.core.config import Config

IMAGE_TYPES = ("image/png", "image/jpeg", "image/webp")
IMAGE_FORMATS = ("PNG", "JPEG", "WEBP")
RETRY_AFTER_S = 1
LEAST_TIMEOUT_S = 1.0
MAX_KEY = 200
# A longer strip is cut to this many times its width before it is scaled up to cover the network's input: only its
# centre is looked at, and a strip of 1 x 16,000,000 pixels would become half a gigapixel.
MAX_ASPECT = 64


class RequestError(Exception):
    """A request that is not answered: an HTTP status and one clear sentence for the client."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.message = message


@contextmanager
def refusing() -> Iterator[None]:
    """What the library refuses with a ValueError is the request's fault: status 400."""
    try:
        yield
    except ValueError as error:
        raise RequestError(400, str(error)) from None


class Limits(Config):
    """Bounds on one request and on the work that may wait."""

    max_body_bytes: int = Field(10 * 2**20, ge=1024, description="largest request body, bytes")
    max_pixels: int = Field(16 * 2**20, ge=1, description="most pixels of the images in one request")
    max_rows: int = Field(256, ge=1, description="most images in one request")
    max_queue: int = Field(512, ge=1, description="most images received and not yet answered; above it, 503")
    timeout_s: float = Field(30.0, gt=0, description="longest time for one request, seconds; above it, 504")


class LabellingLimits(Limits):
    """Bounds on what one request may have chosen from."""

    max_values: int = Field(2_000_000, ge=1, description="most numbers in the features or probabilities of a request")
    max_classes: int = Field(10_000, ge=2, description="most classes, and clusters")


class RobustnessLimits(Limits):
    """Bounds on the attacks that one request may ask for."""

    max_budgets: int = Field(100, ge=1, description="most budgets of one FGSM curve")
    max_steps: int = Field(200, ge=1, description="most iterations of an attack")
    max_restarts: int = Field(20, ge=1, description="most random starts of an attack")


class Admission:
    """Counts the images in the server, so that a flood is refused at once instead of waiting for ever."""

    def __init__(self, max_queue: int) -> None:
        self.max_queue = max_queue
        self.held = 0

    @contextmanager
    def hold(self) -> Iterator["Ticket"]:
        """Admit one request for one image; `Ticket.grow` adds the images that its body turns out to hold."""
        ticket = Ticket(self)
        try:
            ticket.grow(1)
            yield ticket
        finally:
            self.held -= ticket.rows


class Ticket:
    def __init__(self, admission: Admission) -> None:
        self.admission = admission
        self.rows = 0

    def grow(self, rows: int) -> None:
        """Raise the request's share to `rows` images, or refuse it with 503."""
        more = max(rows - self.rows, 0)
        if self.admission.held + more > self.admission.max_queue:
            raise RequestError(503, f"the server is busy with {self.admission.held} images; try again later")
        self.admission.held += more
        self.rows += more


async def read_body(chunks: AsyncIterable[bytes], declared: str | None, max_bytes: int) -> bytes:
    """The request body, refused with 413 as soon as its declared or its received length exceeds `max_bytes`."""
    too_large = RequestError(413, f"the body is larger than {max_bytes} bytes; send a smaller image or fewer rows")
    if declared is not None and declared.isascii() and declared.isdigit() and int(declared) > max_bytes:
        raise too_large
    body = bytearray()
    async for chunk in chunks:
        body += chunk
        if len(body) > max_bytes:
            raise too_large
    return bytes(body)


def check_key(key: str | None) -> str | None:
    """An `Idempotency-Key`, refused with 400 if it is longer than `MAX_KEY` or not plain."""
    if key is not None and not re.fullmatch(rf"[A-Za-z0-9_-]{{1,{MAX_KEY}}}", key):
        raise RequestError(400, f"Idempotency-Key: send 1 to {MAX_KEY} letters, digits, - and _")
    return key


def media_type(content_type: str | None) -> str:
    """`"Image/PNG; q=1"` as `"image/png"`; empty if there is none."""
    return (content_type or "").partition(";")[0].strip().lower()


def check_image_type(content_type: str | None) -> None:
    """Refuse, with 415, a content type that is neither an image type we read nor plain bytes."""
    kind = media_type(content_type)
    if kind not in (*IMAGE_TYPES, "application/octet-stream"):
        allowed = ", ".join(IMAGE_TYPES)
        raise RequestError(415, f"Content-Type {kind[:60] or 'missing'!r}: send {allowed} or application/octet-stream")


def decode_image(body: bytes, limits: Limits) -> PIL.Image.Image:
    """Decode a PNG, JPEG or WebP body to what a viewer shows: the first frame, turned as its EXIF orientation says.

    The size in the header is checked before any pixel is decoded; Pillow bounds compressed text and profiles.

    Raises:
        RequestError: 400 for a body that is no such image or is damaged; 413 for too many pixels.
    """
    unreadable = RequestError(400, "the body is not a readable PNG, JPEG or WebP image (damaged or of another format)")
    if not body:
        raise RequestError(400, "the body is empty; send a PNG, JPEG or WebP image")
    try:
        image = PIL.Image.open(BytesIO(body), formats=IMAGE_FORMATS)
        check_pixels(math.prod(image.size), limits)
        image.load()
        return _without_long_ends(_upright(image))
    except RequestError:
        raise
    except PIL.Image.DecompressionBombError:
        raise RequestError(413, f"the image has more than the {limits.max_pixels} pixels that are allowed") from None
    except MemoryError:
        raise RequestError(413, "the image is too large to decode") from None
    # Pillow's decoders report damage through many types (OSError, SyntaxError, ValueError, struct.error, ...).
    except Exception:
        raise unreadable from None


def _upright(image: PIL.Image.Image) -> PIL.Image.Image:
    try:
        return PIL.ImageOps.exif_transpose(image)
    except Exception:  # as above; viewers show a picture with damaged metadata as it is stored
        return image


def _without_long_ends(image: PIL.Image.Image) -> PIL.Image.Image:
    width, height = image.size
    longest = MAX_ASPECT * min(width, height)
    if max(width, height) <= longest:
        return image
    left, top = max(0, (width - longest) // 2), max(0, (height - longest) // 2)
    return image.crop((left, top, min(width, left + longest), min(height, top + longest)))


def check_pixels(pixels: int, limits: Limits) -> None:
    if pixels > limits.max_pixels:
        raise RequestError(413, f"{pixels} pixels, more than the {limits.max_pixels} that are allowed in one request")


def check_rows(rows: int, limits: Limits) -> None:
    if not 1 <= rows <= limits.max_rows:
        raise RequestError(400, f"{rows} images in one request; send 1 to {limits.max_rows}")


@dataclass(frozen=True)
class Wishes:
    """What one request asks for besides its image; None: as the server is set.

    budget: fraction of the full network's multiply-adds. accuracy_goal, cost_goal: a point on the stored calibration
    curve, the cost relative to the last stage's. max_stage: the last stage that may run, from 1. allow_human: a person
    may be asked, behind the last stage.
    """

    budget: float | None = None
    accuracy_goal: float | None = None
    cost_goal: float | None = None
    max_stage: int | None = None
    allow_human: bool = False
    timeout_s: float | None = None
    version: str | None = None
    webhook: str | None = None


def parse_wishes(query: Mapping[str, str], known: tuple[str, ...]) -> Wishes:
    """The wishes in a query string, of those in `known`.

    Raises:
        RequestError: 400 for an unknown parameter, or one out of its range.
    """
    unknown = sorted(set(query) - set(known))
    if unknown:
        raise RequestError(400, f"unknown query parameter {unknown[0][:40]!r}; known: {', '.join(known)}")
    fields = {name: WISHES[name](name, text) for name, text in query.items()}
    return Wishes(**fields)


def _above_zero(name: str, text: str) -> float:
    value = _number(name, text)
    if not 0 < value < math.inf:
        raise RequestError(400, f"{name} = {text[:40]}; give a number above 0")
    return value


def _timeout(name: str, text: str) -> float:
    value = _number(name, text)
    if not value >= LEAST_TIMEOUT_S:
        raise RequestError(400, f"{name} = {text[:40]}; give at least {LEAST_TIMEOUT_S:g} second")
    return value


def _fraction(name: str, text: str) -> float:
    return check_fraction(name, _number(name, text))


def _whole(name: str, text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 10 and int(text) >= 1):
        raise RequestError(400, f"{name} = {text[:40]!r}; give a whole number from 1")
    return int(text)


def _switch(name: str, text: str) -> bool:
    if text not in ("true", "false"):
        raise RequestError(400, f"{name} = {text[:40]!r}; give true or false")
    return text == "true"


def _number(name: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise RequestError(400, f"{name} = {text[:40]!r} is no number; give a number above 0") from None


WISHES = {
    "budget": _fraction,
    "accuracy_goal": _fraction,
    "cost_goal": _above_zero,
    "max_stage": _whole,
    "allow_human": _switch,
    "timeout_s": _timeout,
    "version": lambda name, text: text,
    "webhook": lambda name, text: text,
}


def check_fraction(name: str, value: float) -> float:
    """A value in (0, 1], such as a budget as a fraction of the full network's multiply-adds."""
    if not 0 < value <= 1:
        raise RequestError(400, f"{name} = {value:g}; give a fraction above 0 and up to 1")
    return value
