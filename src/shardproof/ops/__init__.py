"""Operations of models on parts: mathematics and autograd, one file for each family."""
