"""From a diagnosis to sentences, a terminal table and one self-contained page."""
