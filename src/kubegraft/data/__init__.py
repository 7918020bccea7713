"""From labelled images on disk to examples: ingest, manifest, shards, decoding and augmentation."""
