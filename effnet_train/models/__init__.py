"""Networks: the compound-scaled stages, the layers they are made of, EfficientNet itself, MobileNets and ResNets."""
