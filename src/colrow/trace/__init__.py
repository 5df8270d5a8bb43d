"""Recording a model once on meta tensors: operators, the modules and calls they belong to, integers."""
