"""Why a sample cannot be trained on, or is not used as it stands: values instead of exceptions."""

from dataclasses import dataclass
from enum import StrEnum


class Action(StrEnum):
    """What becomes of a sample; the value is the word written to the ledger."""

    EXCLUDED = "excluded"
    """Not trained on. This, and only this, stops a run under the policy ``strict``."""
    TRUNCATED = "truncated"
    """Cut on the right; what is left is trained on."""
    REPAIRED = "repaired"
    """Changed as the published preprocessing changes it, and trained on."""
    NOTED = "noted"
    """Trained on as it stands, but worth a look."""


class Reason(StrEnum):
    """Rules that a sample can break; the value is the word written to the ledger."""

    MALFORMED_RECORD = "malformed_record"
    ROLES_DO_NOT_ALTERNATE = "roles_do_not_alternate"
    ODD_TURNS = "odd_turns"
    EMPTY_TURN = "empty_turn"
    LITERAL_IM_END = "literal_im_end"
    LITERAL_IMG_CONTEXT = "literal_img_context"
    LITERAL_SPECIAL_TOKEN = "literal_special_token"
    IMAGE_COUNT = "image_count"
    TOO_MANY_IMAGES = "too_many_images"
    CUT_INSIDE_IMAGE = "cut_inside_image"
    NO_SUPERVISED_TOKEN = "no_supervised_token"
    IMAGE_UNREADABLE = "image_unreadable"

    LONGER_THAN_SEQ_LENGTH = "longer_than_seq_length"
    FIRST_TURN_DROPPED = "first_turn_dropped"
    PLACEHOLDER_INSERTED = "placeholder_inserted"
    LITERAL_PLACEHOLDER = "literal_placeholder"

    @property
    def action(self) -> Action:
        """What becomes of a sample that breaks the rule."""
        return _ACTIONS.get(self, Action.EXCLUDED)


_ACTIONS = {
    Reason.LONGER_THAN_SEQ_LENGTH: Action.TRUNCATED,
    Reason.FIRST_TURN_DROPPED: Action.REPAIRED,
    Reason.PLACEHOLDER_INSERTED: Action.REPAIRED,
    Reason.LITERAL_PLACEHOLDER: Action.NOTED,
}


@dataclass(frozen=True, kw_only=True)
class Rejection:
    """One broken rule of one sample that is left out."""

    reason: Reason
    """Which rule."""
    detail: str
    """What was found and what to change, one line."""

    def __str__(self) -> str:
        return f"{self.reason.value}: {self.detail}"


@dataclass(frozen=True, kw_only=True)
class Remark:
    """One broken rule of one sample that is used nevertheless."""

    reason: Reason
    """Which rule; its action is not ``excluded``."""
    detail: str
    """What was found and what is done, one line."""
