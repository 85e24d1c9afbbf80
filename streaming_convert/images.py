"""From an image file's bytes to uint8 pixels of the requested size, or a stated reason why not."""


class Rejected(Exception):
    """This sample cannot be converted; the message is the reason that `rejected.jsonl` gives."""
