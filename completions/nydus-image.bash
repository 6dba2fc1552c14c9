# bash completion for nydus-image; made by scripts/reference: do not edit.
_nydus-image() {
    local cur=${COMP_WORDS[COMP_CWORD]} prev=${COMP_WORDS[COMP_CWORD - 1]} path='' i word
    for ((i = 1; i < COMP_CWORD; i++)); do
        word=${COMP_WORDS[i]}
        case $word in
            --batch-size|--blob|--blob-cache-dir|--blob-dir|--blob-id|--bootstrap|--chunk-dict|--chunk-size|--compressor|--digester|--features|--fs-version|--log-file|--log-level|--output-json|--parent-bootstrap|--prefetch-policy|--processes|--source-type|--type|--whiteout-spec|-B|-D|-J|-L|-b|-l|-t|-v) ((i++)); continue ;;
        esac
        case "$path/$word" in
            /create) path=$path/$word ;;
        esac
    done
    case "$path $prev" in
        " -l"|" --log-level") COMPREPLY=($(compgen -W 'trace debug info warn error' -- "$cur")); return ;;
        " -L"|" --log-file") compopt -o filenames; COMPREPLY=($(compgen -f -- "$cur")); return ;;
        "/create -l"|"/create --log-level") COMPREPLY=($(compgen -W 'trace debug info warn error' -- "$cur")); return ;;
        "/create -L"|"/create --log-file") compopt -o filenames; COMPREPLY=($(compgen -f -- "$cur")); return ;;
        "/create -t"|"/create --type"|"/create --source-type") COMPREPLY=($(compgen -W 'dir-rafs tar-rafs targz-rafs estargz-rafs directory' -- "$cur")); return ;;
        "/create -B"|"/create --bootstrap") compopt -o filenames; COMPREPLY=($(compgen -f -- "$cur")); return ;;
        "/create -D"|"/create --blob-dir") compopt -o filenames; COMPREPLY=($(compgen -d -- "$cur")); return ;;
        "/create -b"|"/create --blob") compopt -o filenames; COMPREPLY=($(compgen -f -- "$cur")); return ;;
        "/create --blob-cache-dir") compopt -o filenames; COMPREPLY=($(compgen -d -- "$cur")); return ;;
        "/create --blob-id") COMPREPLY=(); return ;;
        "/create --chunk-size") COMPREPLY=(); return ;;
        "/create --batch-size") COMPREPLY=(); return ;;
        "/create --compressor") COMPREPLY=($(compgen -W 'none lz4_block zstd' -- "$cur")); return ;;
        "/create --digester") COMPREPLY=($(compgen -W 'blake3 sha256' -- "$cur")); return ;;
        "/create -v"|"/create --fs-version") COMPREPLY=($(compgen -W '5 6' -- "$cur")); return ;;
        "/create --features") COMPREPLY=($(compgen -W 'blob-toc' -- "$cur")); return ;;
        "/create --chunk-dict") COMPREPLY=(); return ;;
        "/create --parent-bootstrap") compopt -o filenames; COMPREPLY=($(compgen -f -- "$cur")); return ;;
        "/create --whiteout-spec") COMPREPLY=($(compgen -W 'oci overlayfs none' -- "$cur")); return ;;
        "/create --prefetch-policy") COMPREPLY=($(compgen -W 'none fs blob' -- "$cur")); return ;;
        "/create --processes") COMPREPLY=(); return ;;
        "/create -J"|"/create --output-json") compopt -o filenames; COMPREPLY=($(compgen -f -- "$cur")); return ;;
    esac
    case "$path" in
        '') COMPREPLY=($(compgen -W '-h --help -l --log-level -L --log-file -V --version create' -- "$cur")) ;;
        '/create') COMPREPLY=($(compgen -W '-h --help -l --log-level -L --log-file -t --type --source-type -B --bootstrap -D --blob-dir -b --blob --blob-cache-dir --blob-inline-meta --inline-bootstrap --blob-id --chunk-size --batch-size --compressor --digester -v --fs-version --features -E --encrypt --aligned-chunk --chunk-dict --parent-bootstrap --repeatable --whiteout-spec --prefetch-policy --processes -J --output-json' -- "$cur")) ;;
    esac
}
complete -F _nydus-image nydus-image
