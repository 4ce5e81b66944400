"""Matrix-vector products beside other libraries."""
