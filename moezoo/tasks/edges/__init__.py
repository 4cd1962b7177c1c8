"""The boundary benchmark of SEISM/BSDS on the host: thin responses, match them one to one."""
