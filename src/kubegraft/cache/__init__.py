"""What a frozen backbone said about an image, kept for ever under the content of both (ADR 12).

The training stages call `FeatureCache`, and the command line calls `upkeep`; the modules below are:

    spaces      FeatureSpace: what besides the image decides a value
    keys        images as keys, and which of them are the same
    shard_file  one immutable file of values: its layout, how it is written and read
    index       which key is in which row, in numpy arrays
    folder      the files of one space: their names, their last use, what was left by killed writers
    space_on_disk  how much the cache may take, and which shards go for new ones
    reader      lookup and read: every row verified when a process first reads it
    writer      append: rows become shards behind the caller's back
    bucket      a cache behind gs:// or s3://, of which this machine holds a part
    upkeep      stats, verify, prune

Nothing here raises because of what is on the disk: a value that is missing, damaged or can't be kept is computed again.
"""

from kubegraft.cache.feature_cache import Ensured, FeatureCache, Filled
from kubegraft.cache.keys import first_of_each, image_key, image_keys
from kubegraft.cache.location import BUDGET_VARIABLE, CACHE_VARIABLE, OFF, OPEN_BUDGET, default_location
from kubegraft.cache.reader import FeatureReader
from kubegraft.cache.spaces import FeatureSpace
from kubegraft.cache.writer import FeatureWriter

__all__ = [
    "BUDGET_VARIABLE",
    "CACHE_VARIABLE",
    "OFF",
    "OPEN_BUDGET",
    "Ensured",
    "FeatureCache",
    "FeatureReader",
    "FeatureSpace",
    "FeatureWriter",
    "Filled",
    "default_location",
    "first_of_each",
    "image_key",
    "image_keys",
]
