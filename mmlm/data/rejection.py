"""Why a sample cannot be trained on, as a value instead of an exception."""

from dataclasses import dataclass
from enum import StrEnum


class Reason(StrEnum):
    """Rules that a sample can break; the value is the word written to the ledger."""

    MALFORMED_RECORD = "malformed_record"
    ROLES_DO_NOT_ALTERNATE = "roles_do_not_alternate"
    ODD_TURNS = "odd_turns"
    EMPTY_TURN = "empty_turn"
    LITERAL_IM_END = "literal_im_end"
    LITERAL_IMG_CONTEXT = "literal_img_context"
    IMAGE_COUNT = "image_count"
    TOO_MANY_IMAGES = "too_many_images"
    CUT_INSIDE_IMAGE = "cut_inside_image"
    NO_SUPERVISED_TOKEN = "no_supervised_token"
    IMAGE_UNREADABLE = "image_unreadable"


@dataclass(frozen=True, kw_only=True)
class Rejection:
    """One broken rule of one sample."""

    reason: Reason
    """Which rule."""
    detail: str
    """What was found and what to change, one line."""

    def __str__(self) -> str:
        return f"{self.reason.value}: {self.detail}"
