"""What a comparison is made of: which runs it calls for, and how they are made whatever becomes of them."""
