"""Where the published data is, what it is called, and where it belongs.

From the data section of InternVL's "Reproduce InternVL-Chat-V1-2"
(https://internvl.readthedocs.io/en/latest/internvl1.2/reproduce.html).
"""

from dataclasses import dataclass
from enum import StrEnum

DATASET_REPOSITORY = "OpenGVLab/InternVL-Chat-V1-2-SFT-Data"
"""On HuggingFace: ``opensource/*.jsonl`` and ``data/*.zip``, all that is needed."""

SAM_FOLDER = "sam/images"
SYNTHDOG_FOLDER = "synthdog-en/images"
OCR_VQA_FOLDER = "ocr_vqa/images"
LLAVA_PRETRAIN_FOLDER = "llava/llava_pretrain/images"


@dataclass(frozen=True, kw_only=True)
class PublishedSet:
    """One of the nine sets of the recipe, in the recipe's order."""

    name: str
    """Key in the meta json; the annotation file is ``<name>.jsonl``."""
    root: str
    """Where the set's image paths start, below ``data/``; empty for ``data/`` itself."""
    num_samples: int
    """Lines of the published annotation file."""


PUBLISHED_SETS = (
    PublishedSet(name="sharegpt4v_instruct_gpt4-vision_cap100k", root="", num_samples=102_025),
    PublishedSet(name="llava_instruct_150k_zh", root="coco/", num_samples=157_712),
    PublishedSet(
        name="sharegpt4v_mix665k_cap23k_coco-ap9k_lcs3k_sam9k_div2k", root="", num_samples=665_058
    ),
    PublishedSet(name="dvqa_train_200k", root="dvqa/", num_samples=200_000),
    PublishedSet(name="chartqa_train_18k", root="chartqa/", num_samples=18_317),
    PublishedSet(name="ai2d_train_12k", root="ai2d/", num_samples=12_413),
    PublishedSet(name="docvqa_train_10k", root="docvqa/", num_samples=10_211),
    PublishedSet(name="geoqa+", root="geoqa+/", num_samples=72_318),
    PublishedSet(name="synthdog_en", root="synthdog-en/", num_samples=29_765),
)

SETS_WITH_BOXES = ("sharegpt4v_mix665k_cap23k_coco-ap9k_lcs3k_sam9k_div2k",)
"""Sets whose RefCOCO and Visual Genome answers hold boxes as ``[x1, y1, x2, y2]`` in 0-1."""

IMAGE_FOLDERS = (
    "ai2d/abc_images",
    "ai2d/images",
    "chartqa/test",
    "chartqa/train",
    "chartqa/val",
    "coco/train2017",
    "docvqa/test",
    "docvqa/train",
    "docvqa/val",
    "dvqa/images",
    "geoqa+/images",
    "gqa/images",
    LLAVA_PRETRAIN_FOLDER,
    OCR_VQA_FOLDER,
    SAM_FOLDER,
    "share_textvqa/images",
    SYNTHDOG_FOLDER,
    "textvqa/train_images",
    "vg/VG_100K",
    "vg/VG_100K_2",
    "web-celebrity/images",
    "web-landmark/images",
    "wikiart/images",
)
"""Folders of pictures below ``data/``, as published."""


def image_folders(collection: str) -> tuple[str, ...]:
    """Return the folders of one collection (``coco``, ``vg``, ...), empty for an unknown name."""
    return tuple(folder for folder in IMAGE_FOLDERS if folder.startswith(f"{collection}/"))


COLLECTIONS = tuple(dict.fromkeys(folder.partition("/")[0] for folder in IMAGE_FOLDERS))
"""First parts of `IMAGE_FOLDERS`; the dataset repository has an archive for each."""


class Tool(StrEnum):
    """What fetches a source."""

    URL = "url"
    """wget, one file."""
    HUGGINGFACE = "huggingface"
    """hf, of the package huggingface_hub."""
    DRIVE = "drive"
    """gdown, one file of Google Drive."""
    DRIVE_FOLDER = "drive folder"
    """gdown, all files of a folder of Google Drive."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """Something to download, for those who do not take the dataset repository."""

    name: str
    """Folder below ``downloads/``."""
    tool: Tool
    """What fetches it."""
    address: str
    """URL, id in Google Drive, or HuggingFace repository of type dataset."""
    file: str = ""
    """Name of the file; for HuggingFace the pattern of the files that are wanted."""
    folders: tuple[str, ...] = ()
    """Folders below ``data/`` that its pictures belong to."""
    gigabytes: float | None = None
    """Size that the publisher states, 10^9 bytes, where one is stated."""
    instead_of: str = ""
    """A source that this one replaces; fetched only when it is asked for by name."""
    note: str = ""
    """What a person has to know or do."""


SOURCES = (
    Source(
        name="annotations",
        tool=Tool.URL,
        address="https://huggingface.co/OpenGVLab/InternVL/resolve/main/playground.zip",
        file="playground.zip",
        note="the nine jsonl files",
    ),
    Source(
        name="ai2d",
        tool=Tool.DRIVE,
        address="1dqqa3MnrxMXaU_K9JA6C83je32ibwdOY",
        file="ai2d_images.zip",
        folders=image_folders("ai2d"),
    ),
    Source(
        name="chartqa",
        tool=Tool.URL,
        address="https://huggingface.co/datasets/ahmed-masry/ChartQA/resolve/main/"
        "ChartQA%20Dataset.zip",
        file="chartqa.zip",
        folders=image_folders("chartqa"),
    ),
    Source(
        name="coco",
        tool=Tool.URL,
        address="http://images.cocodataset.org/zips/train2017.zip",
        file="train2017.zip",
        folders=image_folders("coco"),
        gigabytes=18,
    ),
    *(
        Source(
            name=f"docvqa-{split}",
            tool=Tool.URL,
            address=f"https://datasets.cvc.uab.es/rrc/DocVQA/{split}.tar.gz",
            file=f"{split}.tar.gz",
            folders=(f"docvqa/{split}",),
        )
        for split in ("train", "val", "test")
    ),
    Source(
        name="dvqa",
        tool=Tool.DRIVE,
        address="1iKH2lTi1-QxtNUVRxTUWFvUvRHq6HAsZ",
        file="images.tar.gz",
        folders=image_folders("dvqa"),
    ),
    Source(
        name="gqa",
        tool=Tool.URL,
        address="https://downloads.cs.stanford.edu/nlp/data/gqa/images.zip",
        file="images.zip",
        folders=image_folders("gqa"),
        gigabytes=20.3,
    ),
    Source(
        name="llava",
        tool=Tool.URL,
        address="https://huggingface.co/datasets/liuhaotian/LLaVA-Pretrain/resolve/main/images.zip",
        file="images.zip",
        folders=image_folders("llava"),
        gigabytes=27.4,
    ),
    Source(
        name="ocr_vqa",
        tool=Tool.DRIVE_FOLDER,
        address="https://drive.google.com/drive/folders/1_GYPY5UkUy7HIcR0zq3ZCFgeZN7BAfm_",
        folders=image_folders("ocr_vqa"),
        note="a script of the publishers that fetches the pictures one by one: run it yourself in "
        "that folder, it leaves them in images/",
    ),
    Source(
        name="sam",
        tool=Tool.DRIVE,
        address="1dKumdOKSXtV7lIXdrG7jsIK_z2vZv2gs",
        file="sam_images.zip",
        folders=image_folders("sam"),
        note="the 9 thousand pictures that are used. Or put sa_000000.tar to sa_000050.tar there, "
        "from https://ai.meta.com/datasets/segment-anything-downloads/ (a licence to accept)",
    ),
    Source(
        name="textvqa",
        tool=Tool.URL,
        address="https://dl.fbaipublicfiles.com/textvqa/images/train_val_images.zip",
        file="train_val_images.zip",
        folders=image_folders("textvqa"),
    ),
    Source(
        name="synthdog-en",
        tool=Tool.HUGGINGFACE,
        address="naver-clova-ix/synthdog-en",
        file="data/train-0000[0-4]-of-00084-*.parquet",
        folders=(SYNTHDOG_FOLDER,),
        gigabytes=2.45,
        note="parquet files; the stage synthdog turns them into pictures",
    ),
    Source(
        name="synthdog-en-images",
        tool=Tool.URL,
        address="https://huggingface.co/OpenGVLab/InternVL/resolve/main/synthdog-en-images.zip",
        file="synthdog-en-images.zip",
        folders=(SYNTHDOG_FOLDER,),
        instead_of="synthdog-en",
        note="the same pictures, converted by the publishers",
    ),
    Source(
        name="vg-1",
        tool=Tool.URL,
        address="https://cs.stanford.edu/people/rak248/VG_100K_2/images.zip",
        file="images.zip",
        folders=image_folders("vg"),
        gigabytes=9.2,
    ),
    Source(
        name="vg-2",
        tool=Tool.URL,
        address="https://cs.stanford.edu/people/rak248/VG_100K_2/images2.zip",
        file="images2.zip",
        folders=image_folders("vg"),
        gigabytes=5.47,
    ),
    Source(
        name="webdata",
        tool=Tool.DRIVE_FOLDER,
        address="https://drive.google.com/drive/folders/1tCUQ-sq6vdshZVkF0ZeF3K4eztkXJgax",
        folders=(
            "share_textvqa/images",
            "web-celebrity/images",
            "web-landmark/images",
            "wikiart/images",
        ),
        note="for academic use only",
    ),
    Source(
        name="geoqa+",
        tool=Tool.URL,
        address="https://huggingface.co/OpenGVLab/InternVL/resolve/main/geoqa%2B_images.zip",
        file="geoqa+_images.zip",
        folders=image_folders("geoqa+"),
    ),
)
