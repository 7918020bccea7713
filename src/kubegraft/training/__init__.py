"""Head training on a frozen backbone, and fine-tuning of its last blocks, in one loop for any number of devices."""
