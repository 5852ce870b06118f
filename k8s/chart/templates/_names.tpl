{{/* Names, labels and images. */}}

{{/*
What the names of all objects start with: the release's name, with "kleash" in it. Names of Jobs
and Services end at 63 characters, which leaves 40; a longer one is cut and told apart by a hash.
*/}}
{{- define "kleash.fullname" -}}
{{- $base := default .Chart.Name .Values.nameOverride -}}
{{- $name := .Release.Name -}}
{{- if .Values.fullnameOverride -}}
{{- $name = .Values.fullnameOverride -}}
{{- else if not (contains $base .Release.Name) -}}
{{- $name = printf "%s-%s" .Release.Name $base -}}
{{- end -}}
{{- if gt (len $name) 40 -}}
{{- $name = printf "%s-%s" (trunc 33 $name | trimSuffix "-") (sha256sum $name | trunc 6) -}}
{{- end -}}
{{- $name -}}
{{- end -}}

{{/* Name of a component's objects. Takes root, component. */}}
{{- define "kleash.name" -}}
{{- printf "%s-%s" (include "kleash.fullname" .root) .component -}}
{{- end -}}

{{/* Host name of a component's Service within the cluster. Takes root, service. */}}
{{- define "kleash.host" -}}
{{- printf "%s-%s.%s.svc" (include "kleash.fullname" .root) .service .root.Release.Namespace -}}
{{- end -}}

{{- define "kleash.runId" -}}
{{- default .Release.Name .Values.run.id -}}
{{- end -}}

{{/* What selects the pods of a component: these labels never change. Takes root, component. */}}
{{- define "kleash.selectorLabels" -}}
app.kubernetes.io/name: {{ default .root.Chart.Name .root.Values.nameOverride }}
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/component: {{ .component }}
{{- end -}}

{{/* Labels of pods. Takes root, component. */}}
{{- define "kleash.podLabels" -}}
{{ include "kleash.selectorLabels" . }}
app.kubernetes.io/part-of: kleash
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
kleash.dev/run: {{ include "kleash.runId" .root | quote }}
{{- end -}}

{{/* Labels of every other object. Takes root, component, and extra: a map. */}}
{{- define "kleash.labels" -}}
{{- $labels := include "kleash.podLabels" . | fromYaml -}}
{{- $_ := set $labels "helm.sh/chart" (printf "%s-%s" .root.Chart.Name (replace "+" "_" .root.Chart.Version)) -}}
{{- if eq .component "packed" -}}
{{- $_ := set $labels "kleash.dev/stage" "services" -}}
{{- end -}}
{{- toYaml (merge $labels (default dict .extra) .root.Values.commonLabels) -}}
{{- end -}}

{{/*
The metadata of an object, up to and with its labels and annotations.
Takes root, component, and may take name, labels, annotations.
*/}}
{{- define "kleash.metadata" -}}
name: {{ default (include "kleash.name" .) .name }}
namespace: {{ .root.Release.Namespace }}
labels:
  {{- include "kleash.labels" (dict "root" .root "component" .component "extra" .labels) | nindent 2 }}
{{- with merge dict (default dict .annotations) .root.Values.commonAnnotations }}
annotations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end -}}

{{- define "kleash.image" -}}
{{- $image := .Values.image -}}
{{- $registry := default $image.registry ((.Values.global).imageRegistry) -}}
{{- $name := $image.repository -}}
{{- if $registry -}}
{{- $name = printf "%s/%s" (trimSuffix "/" $registry) $name -}}
{{- end -}}
{{- if $image.digest -}}
{{- printf "%s@%s" $name $image.digest -}}
{{- else -}}
{{- printf "%s:%s" $name (default .Chart.AppVersion $image.tag) -}}
{{- end -}}
{{- end -}}

{{/*
One map over another, at every depth. Unlike mergeOverwrite it lets false, 0 and null win, and
leaves both as they are. Takes base, over; gives JSON.
*/}}
{{- define "kleash.merge" -}}
{{- $result := deepCopy .base -}}
{{- range $key, $value := .over -}}
{{- if and (kindIs "map" $value) (kindIs "map" (get $result $key)) -}}
{{- $value = include "kleash.merge" (dict "base" (get $result $key) "over" $value) | fromJson -}}
{{- end -}}
{{- $_ := set $result $key $value -}}
{{- end -}}
{{- toJson $result -}}
{{- end -}}
