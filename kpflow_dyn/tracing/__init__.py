"""From a traced step to its weight sites, the products that carry the state, and the glue between them."""
