import criupy.lazy_pages._cli
