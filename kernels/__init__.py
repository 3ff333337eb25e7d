"""Operations on tensors: each folder holds a reference (plain torch), a Triton kernel where there is one, and the public function."""
