"""Models, data and measures of training: takes names, gives objects of torch and transformers."""
