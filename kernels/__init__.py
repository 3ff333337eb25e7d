"""Operations on tensors: a folder each, with a reference (plain torch), a Triton kernel if any, the public function."""
