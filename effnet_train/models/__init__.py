"""Networks: the compound-scaled stages, the layers they are made of, and EfficientNet itself."""
